@main struct Merino {
    static func main() {
        print("merino")
    }
}
