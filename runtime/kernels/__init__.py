"""Matrix products on packed weights, one module a device, one folder a kernel family."""
