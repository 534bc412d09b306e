"""Convert, compare and measure whole disks."""
