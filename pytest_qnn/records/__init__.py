"""What happened, once: one record per judged run, the only source of the terminal table, JUnit properties and JSON."""
