"""What a fleet would take, by arithmetic: a roofline of each engine step, queues over it, prices.

Pure: numbers in, frozen dataclasses out. `tandem.simulate` prices its steps with the same code.
"""
