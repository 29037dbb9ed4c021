"""The command `titok-fast`: options, checks and printing; the work is done by the packages below.

Reading order: main, options, models, sample, images, album, train, pretokenize, evaluate, convert,
info.
"""
