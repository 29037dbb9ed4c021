"""The fast modes: each technique changes the networks of a pipeline in place, after loading.

`techniques` names them, checks their combinations and sets the defaults; the `cpu_` files and
`cuda_graph` implement them.
Reading order: techniques, cpu_packed, cpu_int8, cpu_int8_ops, cuda_graph, compile_cache,
cpu_training.
"""
