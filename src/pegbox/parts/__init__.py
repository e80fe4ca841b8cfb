"""What the axes are made of, and what knows no method."""
