// What the image commands do.
