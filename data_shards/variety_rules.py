"""Rules of `data_shards/variety.py`, as data: (regular expression, points).

Patterns match lower-case text between word boundaries. Points say how telling a hit is: 2 for
what the other variety hardly writes, 1 for a tendency. Words that both use are left out even when
one prefers them; so are proper names.
"""

PT_PT: tuple[tuple[str, int], ...] = (
    # estar a + infinitive where Brazil has the gerund
    (r"est(?:ou|ás|á|amos|ão|ava|avam|ive|eve|iveram) a \w+[aei]r", 2),
    (r"continu(?:a|am|o|ou|ava) a \w+[aei]r", 1),
    # enclisis: "chama-se", "vê-se", "pode-se"
    (r"\w{2,}-(?:se|lhe|lhes|me|te|nos)", 1),
    (r"(?:ecrã|ecrãs|telemóve(?:l|is)|autocarros?|comboios?|pequeno-almoço|casas? de banho)", 2),
    (r"(?:frigoríficos?|passadeiras?|portagens|talho|montra|montras|peúgas?)", 2),
    (r"(?:ficheiros?|utilizador(?:es)?|descarregar|palavra-passe|equipa|equipas)", 2),
    (r"(?:registo|registos|planeamento|controlo|golo|golos|guarda-redes)", 2),
    (r"(?:facto|factos|contacto|contactos|secção|secções|húmido|húmida|andebol|camião|camiões)", 2),
    (r"(?:castanho|castanha|castanhos|castanhas)", 1),
    # acute where Brazil has a circumflex: económico, fenómeno, António, bebé, ténis
    (r"\w+(?:ómic|ónic|énic|émic)[oa]s?", 2),
    (r"(?:bebé|bebés|puré|croché|cocó|ténis|bónus|fémur|sémen|génio|génios|prémio|prémios)", 2),
    (r"(?:fenómeno|fenómenos|oxigénio|hidrogénio|cénico|ingénuo|género|géneros|polémica)", 2),
    (r"(?:dezasseis|dezassete|dezanove|quilómetros?)", 2),
    (r"(?:sumo de laranja|rebuçados?|pastilha elástica|tu tens|tu és|vós)", 1),
)

PT_BR: tuple[tuple[str, int], ...] = (
    (r"est(?:ou|á|amos|ão|ava|avam) \w+(?:ando|endo|indo)", 2),
    (r"(?:me|te|se|lhe) (?:chamo|chama|diga|conta|explica|mostra) (?:que|o|a|como)", 1),
    (r"(?:você|vocês|a gente)", 1),
    (r"(?:celular|celulares|ônibus|trem|trens|banheiros?|geladeiras?|café da manhã)", 2),
    (r"(?:usuários?|mouse|baixar|times?|esporte|esportes|gol|gols)", 2),
    (r"(?:caminhão|caminhões|sorvetes?|açougue|pedágio|faixa de pedestres?)", 2),
    (
        r"(?:registro|registros|planejamento|goleiro|goleiros|úmido|úmida|handebol|aeromoça)",
        2,
    ),
    (r"(?:marrom|marrons|xícaras?|telas?|arquivos?|senhas?|moleque|bacana|bonde)", 1),
    (r"\w+(?:ômic|ônic|ênic|êmic)[oa]s?", 2),
    (r"(?:bebê|bebês|purê|crochê|cocô|tênis|bônus|fêmur|sêmen|gênio|gênios|prêmio|prêmios)", 2),
    (r"(?:fenômeno|fenômenos|oxigênio|hidrogênio|ingênuo|gênero|gêneros|polêmica|quilômetros?)", 2),
    (r"(?:dezesseis|dezessete|dezenove|quatorze|pra|pro|pras|pros)", 2),
)

# Words that tell Portuguese from its neighbours; only the most frequent, none shared with them.
PORTUGUESE = (
    "não uma um na no nas nos da do das dos em os ao aos à às com são é está há muito mais "
    "também isto isso ele ela eles elas pelo pela num numa seu sua foi ser tem têm você eu "
    "português obrigado sim olá quantos quantas qual quais porque à"
).split()  # fmt: skip
OTHER = (
    "the of and is are was to in it this that with for on as at by from what which there "
    "el los las y con una es está son muy más pero qué cómo del al su "
    "le les des et est une dans pour qui que ce cette avec sur pas "
    "der die das und ist nicht mit ein eine il di che per non sono"
).split()  # fmt: skip
