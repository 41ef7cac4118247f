"""What travels over HTTP, as pydantic models; knows no engine."""
