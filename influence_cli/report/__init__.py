"""Rows to text (formats) and pages (html): pure, without torch."""
