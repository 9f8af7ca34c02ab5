"""What a finished study says, and which of its differences are larger than its noise."""
