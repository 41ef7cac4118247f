"""The page at `/`: index.html, style.css and script.js, served as they lie here by routes/playground.py."""
