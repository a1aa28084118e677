"""Finding heads: effects of single heads, rankings, head sets, and how many heads to take."""
