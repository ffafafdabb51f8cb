"""The quantised network that a spiking one is made of: quantiser, placement, calibration, training."""
