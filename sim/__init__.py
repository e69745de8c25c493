"""One simulated device, its guest, firmware, driver, link and hosts, in virtual time."""
