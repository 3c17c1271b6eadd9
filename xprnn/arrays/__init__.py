"""Array libraries: namespaces, dtypes, devices and shape checks; the linear map and look-up; sparse gradients."""
