"""The process that owns a server and its nsys, and outlives a pytest that dies."""
