"""Sharper masks from coarse ones: a promptable segmenter (SAM, MobileSAM) is shown the photo and the coarse mask."""
