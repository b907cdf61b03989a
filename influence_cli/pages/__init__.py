"""What an HTML report shows, a file per command.

``parts`` are shared; drawing is done by ``report.html``.
"""
