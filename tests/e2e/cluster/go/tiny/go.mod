module local/tiny

go 1.26.0
