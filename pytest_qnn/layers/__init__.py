"""Each layer of a quantised model judged alone: one compile and one inference for all of them."""
