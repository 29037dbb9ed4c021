"""What this processor can do: its instruction sets, and its rate for each number format.

Instruction sets alone say too little: a hypervisor may hide them, and oneDNN runs a format without
a kernel of its own in a loop that is a thousand times slower. So the rates are measured, in about a
second, and kept in the user's cache folder.
Reading order: int8_products, rates, description, here.
"""
