"""What changed inside a tuned model."""
