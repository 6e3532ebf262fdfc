"""qnn-net-run on a device: Qualcomm's own program that loads a model, reads inputs from files and writes outputs to files."""
