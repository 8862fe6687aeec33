"""Which checkpoint is served, and why.

What belongs here: all that is measured about generations (`evidence`), the rules by which a
checkpoint is promoted, held or rejected (`gate`), and the log of decisions, people's among them
(`decisions`). What does not: the metrics (`metrics`) and the estimates (`statistics`).
"""
