"""Results that are kept between runs, progress that is shown, interrupts that lose nothing."""
