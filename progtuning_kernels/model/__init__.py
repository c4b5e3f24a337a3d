"""What a model is: its units, families, adapters and classes."""
