"""Teacher and student: load, quantize, adapt, cut, save, spread over devices."""
