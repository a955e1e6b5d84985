import BlockCore
import BlockGraph
import QMP

/// `check`: what is wrong inside of an image, and its repair.
public struct ImageCheck: Sendable {
    /// After a repair, what the second look found, with what was fixed.
    public var report: CheckReport
    /// What the repair itself found; `nil` where nothing was repaired.
    public var repaired: CheckReport?
    public var filename: String
    public var format: String

    // MARK: Carrying out

    /// Checks an image, and repairs it if asked; then it is checked once more.
    ///
    /// - Parameter notice: takes one line for each thing that is found. Called on the session's thread.
    /// - Returns: `nil` where the format has nothing to check.
    public static func run(
        _ source: ImageSource, repair: CheckRepair, in session: ToolSession,
        _ notice: @escaping @Sendable (String) -> Void
    ) async throws(BlockError) -> ImageCheck? {
        var source = source
        source.isForCheck = true
        source.isWritable = !repair.isEmpty
        let access =
            repair.isEmpty
            ? Access.read
            : Access(uses: [.consistentRead, .write, .resize], shares: .consistentRead)
        let edge = try await session.use(source, as: "image check", access)
        let result: ImageCheck
        do throws(BlockError) {
            var report = try await edge.check(repair, notice)
            var repaired: CheckReport?
            if report.leaksFixed > 0 || report.corruptionsFixed > 0 {
                repaired = report
                var second = try await edge.check([], notice)
                second.leaksFixed = report.leaksFixed
                second.corruptionsFixed = report.corruptionsFixed
                report = second
            }
            let isPlain = !source.isOptions && !source.name.hasPrefix("json:")
            result = ImageCheck(
                report: report, repaired: repaired,
                filename: isPlain ? source.name : edge.node.driver.filename,
                format: edge.node.description.name)
        } catch  where error.code == .unsupported {
            try await session.graph.detach(edge)
            return nil
        }
        try await session.graph.detach(edge)
        return result
    }

    /// 0 clean, 1 parts could not be looked at, 2 corrupt, 3 leaks.
    public var exitCode: Int32 {
        if report.checkErrors > 0 { return 1 }
        if report.corruptions > 0 { return 2 }
        return report.leaks > 0 ? 3 : 0
    }

    // MARK: Output

    /// As people read it.
    public var text: String {
        var text = ""
        if let repaired {
            text += """
                The following inconsistencies were found and repaired:

                    \(repaired.leaksFixed) leaked clusters
                    \(repaired.corruptionsFixed) corruptions

                Double checking the fixed image now...

                """
        }
        if report.isClean { text += "No errors were found on the image.\n" }
        if report.corruptions > 0 {
            text += """

                \(report.corruptions) errors were found on the image.
                Data may be corrupted, or further writes to the image may corrupt it.

                """
        }
        if report.leaks > 0 {
            text += """

                \(report.leaks) leaked clusters were found on the image.
                This means waste of disk space, but no harm to data.

                """
        }
        if report.checkErrors > 0 {
            text += "\n\(report.checkErrors) internal errors have occurred during the check.\n"
        }
        if report.totalClusters > 0, report.allocatedClusters > 0 {
            let allocated = report.allocatedClusters
            text +=
                "\(allocated)/\(report.totalClusters) = "
                + "\(Self.percent(allocated, of: report.totalClusters)) allocated, "
                + "\(Self.percent(report.fragmentedClusters, of: allocated)) fragmented, "
                + "\(Self.percent(report.compressedClusters, of: allocated)) compressed clusters\n"
        }
        if report.imageEndOffset > 0 { text += "Image end offset: \(report.imageEndOffset)\n" }
        return text
    }

    /// With two digits after the point.
    private static func percent(_ part: Int, of whole: Int) -> String {
        let hundredths = Int((Double(part) * 100 / Double(whole) * 100).rounded(.toNearestOrEven))
        let digits = hundredths % 100
        return "\(hundredths / 100).\(digits < 10 ? "0" : "")\(digits)%"
    }

    /// With the keys of QMP's `ImageCheck`.
    public var json: JSONValue {
        var result: JSONObject = [:]
        func add(_ key: String, _ value: Int) {
            if value != 0 { result[key] = .integer(value) }
        }
        add("image-end-offset", report.imageEndOffset)
        add("compressed-clusters", report.compressedClusters)
        add("total-clusters", report.totalClusters)
        add("corruptions-fixed", report.corruptionsFixed)
        add("corruptions", report.corruptions)
        result["check-errors"] = .integer(report.checkErrors)
        add("leaks-fixed", report.leaksFixed)
        add("leaks", report.leaks)
        add("allocated-clusters", report.allocatedClusters)
        result["filename"] = .string(filename)
        result["format"] = .string(format)
        add("fragmented-clusters", report.fragmentedClusters)
        return .object(result)
    }
}
