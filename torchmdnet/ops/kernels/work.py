"""When threads are worth it."""

#: Multiply-adds below which threads cost more than they bring.
WORTH_THREADS = 2_000_000
