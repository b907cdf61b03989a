"""Results to text and pages: rows in every format, and one offline HTML page. Pure: no torch, no data sets."""
