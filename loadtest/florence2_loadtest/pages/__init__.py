"""What reports consist of, for all kinds of results, and how that becomes HTML and PDF."""
