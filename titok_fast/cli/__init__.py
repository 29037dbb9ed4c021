"""The command `titok-fast`: options, checks and printing; the work is done by the packages below.

`main` finds the command's file, prints what it yields and turns errors into one line.
Reading order: main, options, drawing, sample, images, train, pretokenize, evaluate, convert, info.
"""
