"""msdspn_jax: multiset-equivariant set prediction with approximate implicit differentiation."""
