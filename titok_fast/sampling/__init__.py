"""Draw tokens for labels: schedules, the reference sampler and the fast sampler.

A sampler sees a generator through the Protocol in `network`, so models may import samplers.
`masking` holds the same steps for training.
Reading order: network, schedules, reference, unmask, masking.
"""
