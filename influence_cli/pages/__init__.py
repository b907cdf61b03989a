"""What an HTML report shows, one file per command.

``parts`` has what the pages share. ``report.html`` draws them.
"""
