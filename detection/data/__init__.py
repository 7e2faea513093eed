"""Data sets made here, in COCO format."""
