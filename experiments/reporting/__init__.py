"""What a reader sees of an evaluation: tables, figures and a page."""
