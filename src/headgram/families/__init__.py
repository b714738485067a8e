"""Which tensor means what: one data file per family, and the few layout functions that they share."""
