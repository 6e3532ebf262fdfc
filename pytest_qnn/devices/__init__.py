"""Which device: SoCs, and later inventory and leases."""
