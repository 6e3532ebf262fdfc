"""Two models on their way to a phone: from the float original to the quantised file, and the data to test them with."""
