"""iDSPN in plain JAX, to be read in one sitting: what the library does, without the library.

    python experiments/from_scratch.py        # autoencodes sets of four points for some seconds

The paper: Zhang et al., "Multiset-Equivariant Set Prediction with Approximate Implicit
Differentiation", ICLR 2022. Sections below are those of the paper. Every function before `init` is
for one set: Y [n, d] is the set, z its encoding, θ the parameters of an encoder. The package calls
`F` T. `tests/test_from_scratch.py` checks that the package computes the same.
"""

import jax
import jax.numpy as jnp
import optax


def fspool(h, w):
    """Sort every feature over the set, then weigh by position (FSPool, arXiv 1906.02795)."""
    return jnp.sum(jnp.sort(h, axis=0) * w, axis=0)


def g(Y, θ):
    """The set encoder: an MLP on every element, then FSPool (section 3)."""
    h = jax.nn.relu(Y @ θ["W1"] + θ["b1"]) @ θ["W2"] + θ["b2"]
    return fspool(h, θ["w"])


def E(Y, z, θ):
    """The energy of a set: how far its encoding is from z, and the set from Y0 (section 3).

    Y0 is the learned initial set; 0.1 weighs the pull towards it.
    """
    return 0.5 * jnp.mean((g(Y, θ) - z) ** 2) + 0.1 * 0.5 * jnp.mean((Y - θ["Y0"]) ** 2)


def F(Y, z, θ):
    """One plain step of gradient descent. It leaves a minimum where it is."""
    return Y - jax.grad(E)(Y, z, θ)


def descend(z, θ, steps, momentum):
    """Nesterov's gradient descent on the energy. Returns the last two iterates."""
    Y = Y_before = θ["Y0"]
    velocity = jnp.zeros_like(Y)
    for _ in range(steps):
        gradient = jax.grad(E)(Y, z, θ)
        velocity = momentum * velocity + gradient
        Y_before, Y = Y, Y - (gradient + momentum * velocity)
    return Y, Y_before


@jax.custom_vjp
def decode(z, θ):
    """The set of which z is the encoding: argmin_Y E(Y, z, θ)."""
    return descend(z, θ, steps=10, momentum=0.9)[0]


def forward(z, θ):
    """Decode, and keep what the derivative needs: where the last gradient was evaluated."""
    Y, Y_before = descend(z, θ, steps=10, momentum=0.9)
    return Y, (Y_before, z, θ)


def backward(residuals, v):
    """The implicit function theorem, the Hessian taken for the identity: (∂F/∂(z, θ))ᵀ v."""
    Y, z, θ = residuals
    return jax.vjp(lambda z, θ: F(Y, z, θ), z, θ)[1](v)


decode.defvjp(forward, backward)


def loss(params, X):
    """Autoencode: the squared distance of X and its decoding, over the best assignment."""
    Y = decode(g(X, params["encoder"]), params["decoder"])
    cost = jnp.sum((Y[:, None] - X[None]) ** 2, -1)
    rows, columns = optax.assignment.hungarian_algorithm(jax.lax.stop_gradient(cost))
    return jnp.mean(cost[rows, columns])


def init(key, n, d, width):
    """Random parameters of an encoder and a decoder."""

    def encoder(key):
        k = jax.random.split(key, 4)
        return {
            "W1": jax.random.normal(k[0], (d, width)) * d**-0.5,
            "b1": jnp.zeros(width),
            "W2": jax.random.normal(k[1], (width, width)) * width**-0.5,
            "b2": jnp.zeros(width),
            "w": jax.random.normal(k[2], (n, width)) * n**-0.5,
            "Y0": 0.1 * jax.random.normal(k[3], (n, d)),
        }

    return dict(zip(("encoder", "decoder"), map(encoder, jax.random.split(key)), strict=True))


def train(steps=300, n=4, d=2, width=128, batch=64):
    """Adam on fresh random sets; returns the losses."""
    params = init(jax.random.key(0), n, d, width)
    optimizer = optax.adam(1e-3)

    @jax.jit
    def step(params, state, key):
        sets = jax.random.normal(key, (batch, n, d))
        mean_loss = lambda params: jnp.mean(jax.vmap(loss, (None, 0))(params, sets))  # noqa: E731
        value, gradient = jax.value_and_grad(mean_loss)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for key in jax.random.split(jax.random.key(1), steps):
        params, state, value = step(params, state, key)
        losses.append(float(value))
    return losses


if __name__ == "__main__":
    for number, value in enumerate(train()):
        if number % 50 == 0:
            print(f"step {number:3d}   loss {value:.4f}")
