"""ADB: servers, the devices that they know, and a line to a device on which every operation has a deadline."""
