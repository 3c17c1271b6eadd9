"""Plain-array helpers: namespace resolution, argument checks, linear map, table look-up and sparse gradients."""
