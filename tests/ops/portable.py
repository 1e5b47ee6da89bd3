"""What StableHLO must not hold for Trainium's compiler to take it: patterns of a line, and what they mean."""

FORBIDDEN = (
    (r"stablehlo\.sort|chlo\.top_k", "sort and top-k"),
    (r"stablehlo\.(case|if)\b", "data-dependent branches"),
    (r"tensor<[^>]*(f64|complex)", "f64 and complex"),
    (r"custom_call", "custom calls"),
    (r"stablehlo\.(rng|infeed|outfeed|send|recv)\b", "stateful random numbers and host transfers"),
    (r"stablehlo\.reduce\(.* init: .* init: ", "reductions of several operands"),
    (r"dot_general.*tensor<[^>]*x[su]?i\d+>", "integer products"),
    (r"stablehlo\.dynamic_(reshape|broadcast_in_dim|iota|pad|gather)", "dynamic shapes"),
    (r"tensor<[^>]*[su]?i64>", "64-bit integers"),
)
