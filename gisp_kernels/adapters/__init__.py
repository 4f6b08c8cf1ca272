"""Scores of this package inside other pruning stacks: one module a stack, which alone imports it."""
