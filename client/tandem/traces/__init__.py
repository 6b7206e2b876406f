"""Request traces: public formats, and load of our own making."""
