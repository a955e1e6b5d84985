import BlockCore
import BlockCrypto
import BlockGraph
import QMP

/// What `amend` does to the key slots of a LUKS header.
struct LUKSKeyChange: Sendable {
    enum State: String, Sendable, CaseIterable { case active, inactive }

    let state: State
    private let newSecret: SecretBytes?
    private let oldSecret: SecretBytes?
    private let slot: Int?
    private let milliseconds: Int

    /// Reads `state`, `new-secret`, `old-secret`, `keyslot`, `iter-time`.
    init(_ options: OptionReader, _ graph: BlockGraph) throws(BlockError) {
        guard let state = try options.enumeration("state", as: State.self) else {
            throw BlockError(
                .invalidArgument, "option 'state' is missing",
                remedy: "use state=active to set a key, state=inactive to erase one")
        }
        self.state = state
        func secret(_ name: String) throws(BlockError) -> SecretBytes? {
            guard let identifier = try options.string(name), !identifier.isEmpty else { return nil }
            return try EncryptionOptions.passphrase(named: identifier, graph)
        }
        newSecret = try secret("new-secret")
        oldSecret = try secret("old-secret")
        slot = try options.int("keyslot")
        let time = try options.int("iter-time")
        milliseconds = time ?? LUKSCreationOptions.iterationMillisecondsDefault
        if let slot, slot < 0 || slot >= LUKS.slotCount {
            throw BlockError(
                .invalidArgument, "'keyslot' must be 0 to \(LUKS.slotCount - 1), not \(slot)")
        }
        switch state {
        case .active:
            guard newSecret != nil else {
                throw BlockError(
                    .invalidArgument, "'new-secret' is missing: there is no key to set")
            }
        case .inactive:
            guard newSecret == nil, time == nil else {
                throw BlockError(
                    .invalidArgument, "'new-secret' and 'iter-time' are for state=active")
            }
            guard oldSecret != nil || slot != nil else {
                throw BlockError(
                    .invalidArgument, "which key is to be erased?",
                    remedy: "give 'old-secret' or 'keyslot'")
            }
        }
    }

    /// - Parameter masterKey: the one that the image was opened with.
    func apply(
        to area: LUKSArea, masterKey: SecretBytes?, isForced: Bool
    ) async throws(BlockError) {
        switch state {
        case .active: try await set(area, masterKey, isForced)
        case .inactive: try await erase(area, isForced)
        }
    }

    // MARK: Setting

    private func set(
        _ area: LUKSArea, _ opened: SecretBytes?, _ isForced: Bool
    ) async throws(BlockError) {
        var masterKey = opened
        if let oldSecret { masterKey = try await area.masterKey(oldSecret) }
        guard let masterKey, let newSecret else {
            throw EncryptionOptions.lockedError("key-secret' or 'old-secret")
        }
        let slots = area.header.slots
        guard let target = slot ?? slots.firstIndex(where: { !$0.isActive }) else {
            throw BlockError(
                .noSpace, "all \(LUKS.slotCount) key slots are in use", remedy: "erase one first")
        }
        guard !slots[target].isActive || isForced else {
            throw BlockError(
                .alreadyExists, "key slot \(target) is in use",
                remedy: "erase it first, or use --force"
            )
        }
        try await area.setKey(
            target, newSecret, masterKey, iterationMilliseconds: milliseconds)
    }

    // MARK: Erasing

    private func erase(_ area: LUKSArea, _ isForced: Bool) async throws(BlockError) {
        let active = area.header.slots.indices.filter { area.header.slots[$0].isActive }
        var chosen: [Int] = []
        if let slot {
            guard active.contains(slot) || isForced else {
                throw BlockError(.invalidArgument, "key slot \(slot) is erased already")
            }
            chosen = [slot]
        }
        if let oldSecret {
            var matching: [Int] = []
            for slot in chosen.isEmpty ? active : chosen
            where try await area.masterKey(oldSecret, inSlot: slot) != nil {
                matching.append(slot)
            }
            guard !matching.isEmpty else {
                throw BlockError(
                    .permissionDenied, "'old-secret' opens none of the key slots that are meant")
            }
            chosen = matching
        }
        guard active.contains(where: { !chosen.contains($0) }) || isForced else {
            throw BlockError(
                .permissionDenied,
                "that would erase the last key, and all data with it",
                remedy: "set another key first, or use --force")
        }
        for slot in chosen { try await area.eraseKey(slot) }
    }
}
