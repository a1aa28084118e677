"""What a run found, for people: reports in Markdown, tables, plots."""
