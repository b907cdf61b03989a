"""Turns rows into text and pages: every format, and one offline HTML page. No torch, no data sets.

Start with ``writer``. ``html`` draws the pages that the package ``pages`` describes.
"""
