"""The meaning of each operator in plain torch, forward and written-out backward, any dtype."""
