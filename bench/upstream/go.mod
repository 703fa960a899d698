module upstream

go 1.21
