"""What was measured, as frozen records that read and write JSON. Knows no torch."""
